"""What all modules stand on and a reader may skip: nothing of the method is here."""
