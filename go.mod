module packetcapture

go 1.26
