"""HTTP routes: parse, call, format. No decision is taken here."""
