"""Write questions and answers about the standard library of the reader's own Python into data/python-docs/files/."""

from openchatkit.tools.quickstart.python_chats import main

if __name__ == "__main__":
    main()
