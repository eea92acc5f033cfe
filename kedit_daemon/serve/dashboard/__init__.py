"""HTML pages for people: status, facts, log, norm curves, and actions behind a sign-in."""
