"""What the package does, in one command: a converted network, and a detector that learns drawn shapes."""
