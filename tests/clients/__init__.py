"""Real clients (diffusers, transformers) reading tiny models through a real mount."""
