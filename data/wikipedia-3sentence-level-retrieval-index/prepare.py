"""Fetch Wikipedia's retrieval index into data/wikipedia-3sentence-level-retrieval-index/files/ and make it ready."""

from openchatkit.retrieval.wikipedia.preparation import main

if __name__ == "__main__":
    main()
