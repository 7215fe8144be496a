"""Show what training would be given, with the tokens that are trained on in colour, or verify a run's ledger."""

from openchatkit.tools.inspection.command import main

if __name__ == "__main__":
    main()
