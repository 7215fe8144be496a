"""Fetch data from the hub, GitHub, a web server, S3-compatible storage or a folder, and unpack it."""

from openchatkit.download.command import prepare_data

if __name__ == "__main__":
    prepare_data()
