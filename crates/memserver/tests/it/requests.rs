//! What requests do, and what they are refused for.

use std::io::Write;

use farmem_region::{Epoch, Incarnation, PAGE_SIZE, RegionId, SessionId};
use farmem_wire::{Action, FullBody, HEADER_BYTES, Header, MallocReply, RefusalCode};

use crate::raw::{Raw, TestServer};

#[test]
fn a_write_is_read_back() {
    let server = TestServer::start(1024, |_| ());
    let mut client = Raw::with_region(&server, 1000);
    client.write(&[(0, 1, 7), (999, 1, 8)]).unwrap();
    assert_eq!(client.read(&[(999, 1), (0, 0)]).unwrap(), [8, 7]);
    client.write(&[(0, 2, 9)]).unwrap();
    assert_eq!(client.read(&[(0, 2)]).unwrap(), [9]);
    let stat = server.stat();
    assert_eq!((stat.pages, stat.slots, stat.used_bytes), (2, 2, 8192));
    assert_eq!((stat.writes, stat.pages_written), (2, 3));
    assert_eq!((stat.reads, stat.pages_read), (2, 3));
}

#[test]
fn an_absent_page_is_never_zeros() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::with_region(&server, 64);
    client.write(&[(1, 1, 1), (3, 1, 3)]).unwrap();
    assert_eq!(client.read(&[(2, 0)]), Err(RefusalCode::NoPage));
    assert_eq!(client.read(&[(1, 0), (2, 0), (3, 0)]), Err(RefusalCode::NoPage));
    assert_eq!(client.read(&[(1, 2)]), Err(RefusalCode::WrongVersionOfPage));
    assert_eq!(client.read(&[(64, 0)]), Err(RefusalCode::OutOfBounds));
    assert_eq!(client.read(&[(u64::MAX, 0)]), Err(RefusalCode::OutOfBounds));
    client.free(0, 3).unwrap();
    assert_eq!(client.read(&[(1, 0)]), Err(RefusalCode::NoPage));
    assert_eq!(client.free(60, 5), Err(RefusalCode::OutOfBounds));
    assert_eq!(client.free(1, u64::MAX), Err(RefusalCode::OutOfBounds));
    let stat = server.stat();
    assert_eq!((stat.pages, stat.slots), (1, 1));
}

#[test]
fn a_repeated_write_is_harmless_and_an_old_one_is_refused() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::with_region(&server, 64);
    client.write(&[(5, 2, 1)]).unwrap();
    client.write(&[(5, 2, 1)]).unwrap();
    assert_eq!(client.write(&[(5, 2, 9)]), Err(RefusalCode::OldVersion));
    assert_eq!(client.write(&[(5, 1, 1)]), Err(RefusalCode::OldVersion));
    // The other pages of such a write are stored.
    assert_eq!(client.write(&[(6, 1, 6), (5, 1, 1), (7, 1, 7)]), Err(RefusalCode::OldVersion));
    assert_eq!(client.read(&[(5, 2), (6, 1), (7, 1)]).unwrap(), [1, 6, 7]);
    // A page that is named twice in one message takes its last version.
    client.write(&[(8, 1, 1), (8, 2, 2)]).unwrap();
    assert_eq!(client.read(&[(8, 2)]).unwrap(), [2]);
    assert_eq!(server.stat().slots, 4);
}

#[test]
fn cap_84_a_damaged_page_changes_nothing() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::with_region(&server, 64);
    client.write(&[(0, 1, 1), (1, 1, 1)]).unwrap();
    let mut message = client.write_message(&[(0, 2, 2), (1, 2, 2)]);
    *message.last_mut().unwrap() ^= 1;
    client.stream.write_all(&message).unwrap();
    assert_eq!(client.receive().0.refusal, Some(RefusalCode::WrongChecksum));
    assert_eq!(client.read(&[(0, 1), (1, 1)]).unwrap(), [1, 1]);
    let stat = server.stat();
    assert_eq!((stat.slots, stat.damaged_pages), (2, 1));
}

#[test]
fn a_client_that_dies_in_the_middle_of_a_write_harms_nothing() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::with_region(&server, 64);
    client.write(&[(0, 1, 1)]).unwrap();
    let mut second = client.attach(&server, farmem_wire::AttachMode::Join, 0).unwrap();
    let message = second.write_message(&[(0, 2, 2), (1, 2, 2)]);
    for cut in [10, HEADER_BYTES + 3, HEADER_BYTES + 64 + 5000] {
        let mut second = client.attach(&server, farmem_wire::AttachMode::Join, 0).unwrap();
        second.stream.write_all(&message[..cut]).unwrap();
    }
    drop(second);
    server.wait_until(|stat| stat.connections == 2 && stat.slots == 1);
    assert_eq!(client.read(&[(0, 1)]).unwrap(), [1]);
    assert_eq!(client.read(&[(1, 0)]), Err(RefusalCode::NoPage));
}

#[test]
fn every_field_of_a_request_is_checked() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::with_region(&server, 32);
    client.write(&[(0, 1, 1)]).unwrap();
    let mut other = Raw::with_region(&server, 32);
    other.write(&[(0, 1, 2)]).unwrap();
    let right = client.session;
    let wrong = [
        (Header { session: SessionId::new(99), ..right }, RefusalCode::NotAttached),
        (Header { session: other.session.session, ..right }, RefusalCode::NotAttached),
        (Header { token: right.token ^ 1, ..right }, RefusalCode::WrongToken),
        (Header { epoch: Epoch::new(0), ..right }, RefusalCode::StaleEpoch),
        (Header { epoch: Epoch::new(2), ..right }, RefusalCode::StaleEpoch),
        (Header { incarnation: Incarnation::new(1), ..right }, RefusalCode::WrongIncarnation),
        (Header { region: RegionId::new(99), ..right }, RefusalCode::NoRegion),
        (Header { region: other.session.region, ..right }, RefusalCode::NoRegion),
    ];
    for (header, code) in wrong {
        client.session = header;
        assert_eq!(client.read(&[(0, 0)]), Err(code), "{header:?}");
        assert_eq!(client.write(&[(0, 5, 5)]), Err(code), "{header:?}");
        assert_eq!(client.free(0, 1), Err(code), "{header:?}");
        assert_eq!(client.malloc(32, 1), Err(code), "{header:?}");
    }
    client.session = right;
    assert_eq!(client.read(&[(0, 1)]).unwrap(), [1]);
    assert_eq!(other.read(&[(0, 1)]).unwrap(), [2]);
    assert_eq!(client.write(&[(32, 1, 1)]), Err(RefusalCode::OutOfBounds));
    assert_eq!(client.write(&[(u64::MAX, 1, 1)]), Err(RefusalCode::OutOfBounds));
}

#[test]
fn an_unknown_action_is_refused_and_the_connection_stays() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::with_region(&server, 64);
    for number in [0, 31, 32, 39, 255] {
        let header = client.request(Action::from_number(number));
        let (reply, _) = client.call(header, |out| out.extend_from_slice(&[1; 100]));
        assert_eq!(reply.refusal, Some(RefusalCode::Unsupported));
    }
    client.write(&[(0, 1, 1)]).unwrap();
    assert!(client.call(client.request(Action::Ping), |_| ()).0.refusal.is_none());
}

#[test]
fn cap_81_a_full_server_says_what_is_free() {
    let server = TestServer::start(100, |_| ());
    let mut first = Raw::greeted(&server);
    assert_eq!(first.setup(60, false, false).unwrap().granted.get(), 60 * 4096);
    let mut second = Raw::greeted(&server);
    assert_eq!(second.setup(41, false, false), Err(RefusalCode::Full));
    assert_eq!(second.setup(41, true, false).unwrap().granted.get(), 40 * 4096);
    let mut third = Raw::greeted(&server);
    assert_eq!(third.setup(1, true, false), Err(RefusalCode::Full));
    assert_eq!(third.setup(u64::MAX / 4096, true, false), Err(RefusalCode::Full));
    // Growing beyond a static grant.
    second.malloc(0, 40).unwrap();
    let malloc = farmem_wire::Malloc {
        from: farmem_region::PageCount::new(40),
        add: farmem_region::PageCount::new(2),
    };
    let (reply, body) = second.call(second.request(Action::Malloc), |out| malloc.encode(out));
    assert_eq!(reply.refusal, Some(RefusalCode::Full));
    let full = FullBody::decode(&body).unwrap();
    assert_eq!((full.asked.get(), full.free.get()), (2 * 4096, 0));
    // What one gives back the other can have.
    let header = first.request(Action::Disconnect);
    assert!(first.call(header, |_| ()).0.refusal.is_none());
    assert_eq!(third.setup(60, false, false).unwrap().granted.get(), 60 * 4096);
}

#[test]
fn cap_81_a_dynamic_reservation_grows() {
    let server = TestServer::start(100, |_| ());
    let mut client = Raw::greeted(&server);
    client.setup(10, false, true).unwrap();
    let reply = MallocReply::decode(&client.malloc(0, 50).unwrap()).unwrap();
    assert_eq!((reply.pages.get(), reply.granted.get()), (50, 50 * 4096));
    assert_eq!(client.malloc(50, 51), Err(RefusalCode::Full));
    client.malloc(50, 50).unwrap();
    assert_eq!(server.stat().reserved_bytes, 100 * 4096);
}

#[test]
fn a_repeated_malloc_is_harmless() {
    let server = TestServer::start(100, |_| ());
    let mut client = Raw::with_region(&server, 50);
    let first = client.malloc(0, 50).unwrap();
    let reply = MallocReply::decode(&first).unwrap();
    assert_eq!((reply.address.raw(), reply.pages.get()), (0, 50));
    assert_eq!(client.malloc(51, 1), Err(RefusalCode::Malformed));
    assert_eq!(client.malloc(u64::MAX, u64::MAX), Err(RefusalCode::Malformed));
}

#[test]
fn cap_56_addresses_go_on_in_the_next_block() {
    let server = TestServer::start(64, |config| {
        config.server = farmem_region::ServerId::new(5);
        // Blocks of 16 pages.
        config.widths = farmem_region::AddressWidths::new(16, 32, 16).unwrap();
    });
    let widths = farmem_region::AddressWidths::new(16, 32, 16).unwrap();
    let mut first = Raw::with_region(&server, 20);
    let mut second = Raw::with_region(&server, 1);
    let place = |body: Vec<u8>| {
        let address = MallocReply::decode(&body).unwrap().address;
        let (server, block, offset) = widths.split(address);
        (server.get(), block.get(), offset / PAGE_SIZE as u64)
    };
    assert_eq!(place(first.malloc(0, 1).unwrap()), (5, 0, 0));
    assert_eq!(place(first.malloc(17, 1).unwrap()), (5, 1, 1));
    assert_eq!(place(second.malloc(0, 1).unwrap()), (5, 2, 0));
}

/// A page that one message names twice is what it is the second time, if that is newer; and no page is ever written in
/// the version of what was never written.
#[test]
fn a_page_that_is_named_twice_needs_a_greater_version() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::with_region(&server, 16);
    client.write(&[(1, 1, 1), (2, 1, 2), (1, 2, 3)]).unwrap();
    assert_eq!(client.read(&[(1, 2), (2, 1)]), Ok(vec![3, 2]));
    for wrong in [
        [(1, 3, 4), (3, 1, 5), (1, 3, 6)],
        [(1, 4, 4), (3, 1, 5), (1, 3, 6)],
        [(1, 3, 4), (3, 1, 5), (1, 3, 4)],
        [(1, 3, 4), (3, 1, 5), (4, 0, 6)],
    ] {
        assert_eq!(client.write(&wrong), Err(RefusalCode::Malformed), "{wrong:?}");
    }
    assert_eq!(client.read(&[(1, 0), (2, 0)]), Ok(vec![3, 2]), "nothing has changed");
    assert_eq!(client.read(&[(3, 0)]), Err(RefusalCode::NoPage));
    assert_eq!(client.read(&[(4, 0)]), Err(RefusalCode::NoPage));
}
