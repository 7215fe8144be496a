"""Make a Hugging Face model of a GPT-J training checkpoint, this kit's or the original's."""

from openchatkit.convert.to_hf import convert_command

main = convert_command(__file__, family="gptj", config_name="EleutherAI/gpt-j-6b", stages=2, layers_per_stage=14)

if __name__ == "__main__":
    main()
