"""Fetch the OIG data set, or the files of it that --files names, into data/OIG/files/."""

from openchatkit.data.oig import main

if __name__ == "__main__":
    main()
