"""Make a Hugging Face model of a GPT-NeoX training checkpoint, this kit's or the original's."""

from openchatkit.convert.to_hf import convert_command

main = convert_command(__file__, family="gpt_neox", config_name="EleutherAI/gpt-neox-20b", stages=8, layers_per_stage=6)

if __name__ == "__main__":
    main()
