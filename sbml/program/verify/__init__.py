"""What ``--mode=verify`` compares: this package's ways to a number, with closed forms."""
