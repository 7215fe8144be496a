"""Upload a model's folder to the Hugging Face hub; see README.md."""

from openchatkit.tools.hub_upload import main

if __name__ == "__main__":
    main()
