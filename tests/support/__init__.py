"""What tests lean on: a loopback Hub, ways to damage a file, forwards of families written out."""
