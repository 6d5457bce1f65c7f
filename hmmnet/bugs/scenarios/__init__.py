"""What happens: one function for each bug, which raises `Found` when something went wrong. They know commands, not who has which bug."""
