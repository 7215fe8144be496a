"""Fetch togethercomputer/RedPajama-INCITE-Base-3B-v1 from the Hugging Face hub and make layer shards of it."""

from openchatkit.convert.from_hf import prepare_command

main = prepare_command(__file__, "togethercomputer/RedPajama-INCITE-Base-3B-v1")

if __name__ == "__main__":
    main()
