"""The Wikipedia index, to be imported as in the original kit; or python retrieval/wikipedia.py QUESTION."""

from openchatkit.retrieval.wikipedia.index import WikipediaIndex, main

__all__ = ["WikipediaIndex"]

if __name__ == "__main__":
    main()
