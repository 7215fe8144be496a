"""Fetch the OIG-moderation data set, or the files of it that --files names, into data/OIG-moderation/files/."""

from openchatkit.download.command import MODERATION, dataset_command

main = dataset_command("OIG-moderation", MODERATION, "All its files.", everything="*")

if __name__ == "__main__":
    main()
