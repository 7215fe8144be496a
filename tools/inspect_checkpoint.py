"""Show the tensors of a model, or where two models differ; see README.md."""

from openchatkit.tools.checkpoint_inspection import main

if __name__ == "__main__":
    main()
