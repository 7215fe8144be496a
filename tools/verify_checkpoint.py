"""Compare the checkpoints of a run with their manifests, byte for byte, and repair `latest`."""

from openchatkit.tools.checkpoint_verification import main

if __name__ == "__main__":
    main()
