"""Fetch EleutherAI/gpt-neox-20b from the Hugging Face hub and make layer shards of it."""

from openchatkit.convert.from_hf import prepare_command

main = prepare_command(__file__, "EleutherAI/gpt-neox-20b")

if __name__ == "__main__":
    main()
