"""Fine-tune a causal language model: one process a rank, started by the finetune_*.sh scripts or by torchrun."""

from openchatkit.training.command import main

if __name__ == "__main__":
    main()
