"""How much a server takes in."""

MOST_BODY = 64 << 20  # bytes
MOST_PICTURE_BYTES = 48 << 20  # of one that is sent
MOST_PAGES = 8  # explanations in memory; each has several megabytes
HEAD_SECONDS = 20  # for the head of a request
BODY_SECONDS, PAUSE_SECONDS = 60, 10  # for a whole body, and between two parts of it
SHORTEST_TOKEN = 8  # characters
GUESSES, PER_SECOND = 10, 0.5  # wrong tokens from one address: so many at once, and then so many a second
ADDRESSES = 10_000  # that are watched
CONNECTIONS = 500
MOST_PICTURES = 1000  # of one job
MOST_PIXELS = 16 * 2**20  # of one batch
