"""Start one process a rank: `python training/launch.py --world-size 2 training/dist_clm_train.py ...`."""

from openchatkit.distributed.launcher import main

if __name__ == "__main__":
    main()
