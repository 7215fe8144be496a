"""Make layer shards of a GPT-NeoX model (Pythia, RedPajama-INCITE, Dolly ...) from the hub or a folder."""

from openchatkit.convert.from_hf import convert_command

main = convert_command(__file__, "EleutherAI/gpt-neox-20b", family="gpt_neox")

if __name__ == "__main__":
    main()
