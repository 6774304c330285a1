# The commands of a page: what its blocks ```bash hold.
/^```bash$/ { on = 1; print "printf \"\\n\" "; next }
/^```$/ { on = 0 }
on
