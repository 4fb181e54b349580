"""Data sets by SPEC: registered, sampled, mapped to training examples."""
