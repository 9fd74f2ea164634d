//! Both kinds of socket keep the promises of `Connection`.

use std::io::{self, IoSlice, IoSliceMut};
use std::time::{Duration, Instant};

use farmem_transport::{Connection, Endpoint, Listener, Moved, Socket};

fn endpoints(directory: &tempfile::TempDir) -> [Endpoint; 2] {
    let unix = directory.path().join("socket");
    [Endpoint::Tcp("127.0.0.1:0".parse().unwrap()), Endpoint::Unix(unix)]
}

fn pair(listener: &Listener) -> (Socket, Socket) {
    let client = Socket::connect(listener.endpoint()).unwrap();
    (client, until(|| listener.accept().unwrap()))
}

/// Waits until there is something, at most 5 seconds.
fn until<T>(mut poll: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(it) = poll() {
            return it;
        }
        assert!(began.elapsed() < Duration::from_secs(5), "it never came");
        std::thread::yield_now();
    }
}

fn receive(socket: &mut Socket, slices: &mut [IoSliceMut<'_>]) -> Moved {
    until(|| Some(socket.receive(slices).unwrap()).filter(|moved| *moved != Moved::WouldBlock))
}

#[test]
fn vectors_go_through() {
    let directory = tempfile::tempdir().unwrap();
    for endpoint in endpoints(&directory) {
        let listener = Listener::bind(&endpoint).unwrap();
        let (mut client, mut server) = pair(&listener);
        let mut nothing = [0];
        assert_eq!(
            server.receive(&mut [IoSliceMut::new(&mut nothing)]).unwrap(),
            Moved::WouldBlock
        );
        let parts = [IoSlice::new(b"abc"), IoSlice::new(b""), IoSlice::new(b"defg")];
        assert_eq!(client.send(&parts).unwrap(), Moved::Bytes(7));
        let (mut first, mut second) = ([0; 5], [0; 5]);
        let mut room = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        assert_eq!(receive(&mut server, &mut room), Moved::Bytes(7));
        assert_eq!((&first, &second), (b"abcde", b"fg\0\0\0"));
        drop(client);
        assert_eq!(receive(&mut server, &mut [IoSliceMut::new(&mut first)]), Moved::Closed);
    }
}

#[test]
fn a_full_socket_says_so_and_a_gone_peer_raises_no_signal() {
    let directory = tempfile::tempdir().unwrap();
    for endpoint in endpoints(&directory) {
        let listener = Listener::bind(&endpoint).unwrap();
        let (mut client, server) = pair(&listener);
        let block = vec![0; 1 << 20];
        while client.send(&[IoSlice::new(&block)]).unwrap() != Moved::WouldBlock {}
        drop(server);
        // SIGPIPE would end the test.
        until(|| client.send(&[IoSlice::new(&block)]).err());
    }
}

#[test]
fn nobody_listens() {
    let directory = tempfile::tempdir().unwrap();
    for endpoint in endpoints(&directory) {
        let endpoint = Listener::bind(&endpoint).unwrap().endpoint().clone();
        let error = Socket::connect(&endpoint)
            .map(|mut socket| until(|| socket.send(&[IoSlice::new(b"x")]).err()));
        let kind = error.unwrap_or_else(|error| error).kind();
        let gone = [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound];
        assert!(gone.contains(&kind), "{kind}");
    }
}

#[test]
fn a_descriptor_is_passed_over_unix_only() {
    let directory = tempfile::tempdir().unwrap();
    let [tcp, unix] = endpoints(&directory);
    let listener = Listener::bind(&unix).unwrap();
    let (mut client, mut server) = pair(&listener);
    let file = std::fs::File::open("/dev/null").unwrap();
    let passed = std::os::fd::AsFd::as_fd(&file);
    assert!(client.passes_descriptors());
    assert_eq!(client.send_with(&[IoSlice::new(b"x")], passed).unwrap(), Moved::Bytes(1));
    let mut byte = [0];
    let (_, got) = until(|| {
        let (moved, got) = server.receive_with(&mut [IoSliceMut::new(&mut byte)]).unwrap();
        (moved != Moved::WouldBlock).then_some((moved, got))
    });
    assert!(got.is_some());
    let listener = Listener::bind(&tcp).unwrap();
    assert!(!pair(&listener).0.passes_descriptors());
}

#[test]
fn a_socket_file_left_behind_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let endpoint = Endpoint::Unix(path.clone());
    let listener = Listener::bind(&endpoint).unwrap();
    let error = Listener::bind(&endpoint).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn what_is_looked_out_for_is_found() {
    let directory = tempfile::tempdir().unwrap();
    for endpoint in endpoints(&directory) {
        let listener = Listener::bind(&endpoint).unwrap();
        let (mut client, mut server) = pair(&listener);
        let mut room = [0; 3];
        for _ in 0..3 {
            // Found empty, and asked again.
            for _ in 0..2 {
                let nothing = client.receive(&mut [IoSliceMut::new(&mut room)]).unwrap();
                assert_eq!(nothing, Moved::WouldBlock);
            }
            server.send(&[IoSlice::new(b"abcde")]).unwrap();
            assert_eq!(receive(&mut client, &mut [IoSliceMut::new(&mut room)]), Moved::Bytes(3));
            assert_eq!(receive(&mut client, &mut [IoSliceMut::new(&mut room)]), Moved::Bytes(2));
        }
        // The end of a connection is no emptiness.
        let nothing = client.receive(&mut [IoSliceMut::new(&mut room)]).unwrap();
        assert_eq!(nothing, Moved::WouldBlock);
        drop(server);
        assert_eq!(receive(&mut client, &mut [IoSliceMut::new(&mut room)]), Moved::Closed);
    }
}

#[test]
fn a_connection_within_one_machine_is_not_paced() {
    let listener = Listener::bind(&Endpoint::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let (client, server) = pair(&listener);
    for end in [&client, &server] {
        let control = rustix::net::sockopt::tcp_congestion(end.descriptor()).unwrap();
        assert_eq!(control, "reno");
    }
}

#[test]
fn the_processor_of_a_peer_on_this_machine_is_known() {
    let directory = tempfile::tempdir().unwrap();
    let [tcp, unix] = endpoints(&directory);
    let listener = Listener::bind(&tcp).unwrap();
    let (mut client, mut server) = pair(&listener);
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let here = rustix::thread::sched_getcpu();
    let mut only = rustix::thread::CpuSet::new();
    only.set(here);
    rustix::thread::sched_setaffinity(None, &only).unwrap();
    client.send(&[IoSlice::new(b"a")]).unwrap();
    rustix::thread::sched_setaffinity(None, &allowed).unwrap();
    assert_eq!(receive(&mut server, &mut [IoSliceMut::new(&mut [0])]), Moved::Bytes(1));
    assert_eq!(server.peer_processor(), Some(here));
    let listener = Listener::bind(&unix).unwrap();
    assert_eq!(pair(&listener).1.peer_processor(), None, "the kernel does not tell");
}
