"""The diagnostics under other people's trainers; each module is imported by its full name, and needs only its own library."""
