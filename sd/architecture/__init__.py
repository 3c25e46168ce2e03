"""What a model consists of: counted, and shown as a table or a page."""
