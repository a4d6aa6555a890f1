"""RASP programs compiled with Tracr, and the script that compiles them."""
