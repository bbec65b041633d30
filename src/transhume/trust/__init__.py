"""Who is who in a farm: certificates, the files they are in, and TLS with them."""
