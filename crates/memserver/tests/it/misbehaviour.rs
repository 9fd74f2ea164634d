//! Peers that break the protocol: dropped with a line in the log, counted, and nobody else is
//! disturbed.

use std::io::Write;
use std::time::Duration;

use farmem_wire::{Action, HEADER_BYTES, Header, Hello, RefusalCode, ServerStat, seal};

use crate::raw::{Raw, TestServer};

/// Sends `bytes` after hello and expects to be dropped for the reason that `counter` counts.
fn dropped_for(bytes: &[u8], counter: impl Fn(&ServerStat) -> u64, line: &str) {
    let server = TestServer::start(64, |_| ());
    let mut bystander = Raw::with_region(&server, 64);
    bystander.write(&[(0, 1, 1)]).unwrap();
    let mut bad = Raw::greeted(&server);
    bad.stream.write_all(bytes).unwrap();
    assert!(bad.is_dropped());
    assert_eq!(counter(&server.stat()), 1);
    assert!(server.logs(line));
    assert_eq!(bystander.read(&[(0, 1)]).unwrap(), [1]);
    bystander.call(bystander.request(Action::Disconnect), |_| ());
    drop((bystander, bad));
    server.wait_until_empty();
}

fn ping() -> Vec<u8> {
    let mut message = vec![0; HEADER_BYTES];
    seal(Header::request(Action::Ping, 1), &mut message);
    message
}

#[test]
fn garbage() {
    dropped_for(&[0x55; 5000], |stat| stat.bad_magic, "not an MSMP message");
    dropped_for(
        b"GET / HTTP/1.1\r\nHost: example.invalid\r\nUser-Agent: somebody who is lost and \
        says so at length\r\n\r\n",
        |stat| stat.bad_magic,
        "not an MSMP message",
    );
}

#[test]
fn a_flipped_bit_in_a_header() {
    let mut message = ping();
    // The payload's length: it must not be believed.
    message[63] ^= 0x80;
    dropped_for(&message, |stat| stat.bad_header_crc, "header damaged");
}

#[test]
fn a_flipped_bit_in_a_body() {
    let mut message = vec![0; HEADER_BYTES];
    Hello { oldest: 1, newest: 1, share_arena: false }.encode(&mut message);
    seal(Header::request(Action::Hello, 1), &mut message);
    message[HEADER_BYTES] ^= 1;
    dropped_for(&message, |stat| stat.bad_body_crc, "body damaged");
}

#[test]
fn a_message_that_is_too_large() {
    let header = Header { entries: 257, ..Header::request(Action::Read, 1) };
    dropped_for(&header.encode(), |stat| stat.too_large, "257 entries");
    let header = Header { payload: u32::MAX, ..Header::request(Action::Setup, 1) };
    dropped_for(&header.encode(), |stat| stat.too_large, "is not allowed");
}

#[test]
fn another_version_after_hello() {
    let header = Header { version: 2, ..Header::request(Action::Ping, 1) };
    dropped_for(&header.encode(), |stat| stat.bad_version, "protocol version 2");
}

#[test]
fn a_reply_instead_of_a_request() {
    let header = Header { reply: true, ..Header::request(Action::Ping, 1) };
    dropped_for(&header.encode(), |stat| stat.bad_magic, "a reply instead of a request");
}

#[test]
fn no_version_in_common() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::silent(&server);
    let hello = Hello { oldest: 2, newest: 9, share_arena: false };
    let (reply, _) = client.call(Header::request(Action::Hello, 0), |out| hello.encode(out));
    assert_eq!(reply.refusal, Some(RefusalCode::WrongVersion));
    assert!(client.is_dropped());
    assert!(server.logs("versions 2 to 9 only"));
    assert_eq!(server.stat().bad_version, 1);
    // A newer client that still speaks this version is served.
    let mut client = Raw::silent(&server);
    let hello = Hello { oldest: 1, newest: 9, share_arena: false };
    let header = Header { version: 9, ..Header::request(Action::Hello, 0) };
    assert_eq!(client.call(header, |out| hello.encode(out)).0.refusal, None);
}

#[test]
fn hello_comes_first() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::silent(&server);
    let (reply, _) = client.call(Header::request(Action::Stat, 0), |_| ());
    assert_eq!(reply.refusal, Some(RefusalCode::HelloFirst));
}

#[test]
fn a_truncated_message_leaves_nothing() {
    let server = TestServer::start(64, |_| ());
    for cut in [1, HEADER_BYTES - 1, HEADER_BYTES + 1, HEADER_BYTES + 100] {
        let mut client = Raw::with_region(&server, 8);
        let message = client.write_message(&[(0, 1, 1), (1, 1, 1)]);
        client.stream.write_all(&message[..cut]).unwrap();
        let mut supervisor = Raw::greeted(&server);
        supervisor.call(client.request(Action::Disconnect), |_| ());
    }
    server.wait_until_empty();
}

#[test]
fn a_peer_that_connects_and_says_nothing() {
    let server = TestServer::start(64, |config| {
        config.limits.hello_timeout = Duration::from_millis(150);
    });
    let mut silent = Raw::silent(&server);
    let mut slow = Raw::silent(&server);
    slow.stream.write_all(&ping()[..20]).unwrap();
    assert!(silent.is_dropped() && slow.is_dropped());
    assert!(server.logs("did not say hello in time"));
    assert_eq!(server.stat().silent_peers, 2);
}

#[test]
fn a_peer_that_does_not_finish_a_message() {
    let server = TestServer::start(64, |config| {
        config.limits.message_timeout = Duration::from_millis(150);
    });
    let mut idle = Raw::with_region(&server, 8);
    let mut stalled = Raw::with_region(&server, 8);
    let message = stalled.write_message(&[(0, 1, 1)]);
    stalled.stream.write_all(&message[..1000]).unwrap();
    assert!(stalled.is_dropped());
    assert!(server.logs("did not finish a message in time"));
    let stat = server.stat();
    assert_eq!((stat.stalled_peers, stat.slots), (1, 0));
    // Who owes nothing may be silent as long as it likes.
    idle.write(&[(0, 1, 1)]).unwrap();
}

#[test]
fn a_peer_that_does_not_take_its_replies() {
    let server = TestServer::start(1024, |config| {
        config.limits.output_timeout = Duration::from_millis(300);
        config.limits.output_bytes_max = 1 << 20;
    });
    let mut client = Raw::with_region(&server, 512);
    let pages: Vec<_> = (0..256).map(|page| (page, 1, 1)).collect();
    client.write(&pages).unwrap();
    let entries: Vec<u8> = {
        let mut bytes = Vec::new();
        for (page, version, _) in pages {
            let page = farmem_region::PageIndex::new(page);
            let version = farmem_region::Version::new(version);
            farmem_wire::PageEntry { page, version, ..Default::default() }.encode(&mut bytes);
        }
        bytes
    };
    let header = Header { entries: 256, ..client.request(Action::Read) };
    let mut message = vec![0; HEADER_BYTES];
    message.extend_from_slice(&entries);
    seal(header, &mut message);
    client.stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut asked = 0;
    while asked < 1000 && client.stream.write_all(&message).is_ok() {
        asked += 1;
    }
    assert!(asked < 1000, "the server reads on though nobody takes its replies");
    server.wait_until(|stat| stat.slow_readers == 1);
    assert!(server.logs("did not take its replies"));
    client.stream.set_write_timeout(None).unwrap();
    let mut supervisor = Raw::greeted(&server);
    supervisor.call(client.request(Action::Disconnect), |_| ());
    drop((client, supervisor));
    server.wait_until_empty();
}
