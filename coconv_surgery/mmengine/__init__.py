"""What needs MMEngine alone: the surgery of a config, the hook that guards a plan, and repairs of mmengine."""
