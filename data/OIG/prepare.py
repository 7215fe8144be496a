"""Fetch the OIG data set, or the files of it that --files names, into data/OIG/files/."""

from openchatkit.download.command import OIG, dataset_command

main = dataset_command("OIG", OIG, "All of it is 172 GB.", everything="*.jsonl*")

if __name__ == "__main__":
    main()
