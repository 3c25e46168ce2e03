"""Pictures from and to files: what is read, how it is fitted and masked, and what is written beside the pixels."""
