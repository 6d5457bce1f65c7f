"""Messages between processes: the trio-ZeroMQ bridge, transports, the codec and sessions.

From the socket up, each file knowing only those before it::

    bridge             a ZeroMQ socket that trio tasks can wait on
    transport          channels, listeners, transports: the interfaces
    zmq_transport      ... between processes (ipc, tcp)
    memory_transport   ... inside one trio run
    messages, codec    what is said, and how it looks on the wire (pure)
    crashes            handlers that crash, told to whoever looks for our bugs
    exchange           a session's books: once and in order over a wire that loses (pure)
    session            requests, notes, handlers, heartbeats, lease, goodbye
    secrets            the machine's secret
    server, client     hello and welcome: how sessions come to be
"""
