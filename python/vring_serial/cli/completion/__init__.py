"""What a shell completes: words that options take, and the functions for bash, zsh and fish."""
