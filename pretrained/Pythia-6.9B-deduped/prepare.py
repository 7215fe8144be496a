"""Fetch EleutherAI/pythia-6.9b-deduped from the Hugging Face hub and make layer shards of it."""

from openchatkit.convert.from_hf import prepare_command

main = prepare_command(__file__, "EleutherAI/pythia-6.9b-deduped")

if __name__ == "__main__":
    main()
