"""Make layer shards of a GPT-J model (GPT-J-6B, GPT-JT ...) from the hub or a folder."""

from openchatkit.convert.from_hf import convert_command

main = convert_command(__file__, "EleutherAI/gpt-j-6b", family="gptj")

if __name__ == "__main__":
    main()
