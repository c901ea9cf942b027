"""What comes back: answers, alone, as a map, side by side."""
