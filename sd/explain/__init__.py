"""What happens while a picture is made: recorded, and shown as a page."""
