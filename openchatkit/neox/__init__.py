"""GPT-NeoX's own face: its settings, hosts and commands, translated for the kit's trainer."""
