//! Sessions: how they begin, survive and end.

use std::time::Duration;

use farmem_wire::{Action, AttachMode, RefusalCode};

use crate::raw::{Raw, TestServer};

#[test]
fn disconnect_frees_everything_at_once() {
    let server = TestServer::start(4096, |_| ());
    let mut client = Raw::with_region(&server, 4096);
    for page in (0..4096).step_by(256) {
        let pages: Vec<_> = (page..page + 256).map(|page| (page, 1, 1)).collect();
        client.write(&pages).unwrap();
    }
    assert_eq!(server.stat().pages, 4096);
    // By another connection, which is not attached, as a supervisor does it.
    let mut supervisor = Raw::greeted(&server);
    let header = client.request(Action::Disconnect);
    assert!(supervisor.call(header, |_| ()).0.refusal.is_none());
    let stat = server.stat();
    assert_eq!((stat.pages, stat.slots, stat.sessions, stat.reserved_bytes), (0, 0, 0, 0));
    assert_eq!(client.read(&[(0, 0)]), Err(RefusalCode::NoSession));
    assert_eq!(client.write(&[(0, 2, 0)]), Err(RefusalCode::NoSession));
    let (again, _) = supervisor.call(header, |_| ());
    assert_eq!(again.refusal, Some(RefusalCode::NoSession));
}

#[test]
fn only_who_knows_the_token_may_disconnect() {
    let server = TestServer::start(64, |_| ());
    let client = Raw::with_region(&server, 64);
    let mut thief = Raw::greeted(&server);
    let mut header = client.request(Action::Disconnect);
    header.token ^= 1;
    assert_eq!(thief.call(header, |_| ()).0.refusal, Some(RefusalCode::WrongToken));
    header = client.request(Action::Disconnect);
    header.epoch = farmem_region::Epoch::new(7);
    assert_eq!(thief.call(header, |_| ()).0.refusal, Some(RefusalCode::StaleEpoch));
    let mut forged = Raw::greeted(&server);
    forged.session = client.session;
    forged.session.token ^= 1;
    let denied = forged.attach(&server, AttachMode::Join, 0).err();
    assert_eq!(denied, Some(RefusalCode::WrongToken));
    assert_eq!(server.stat().sessions, 1);
}

#[test]
fn a_session_outlives_its_connection_for_a_while() {
    let server = TestServer::start(64, |config| {
        config.limits.session_timeout = Duration::from_millis(600);
    });
    let mut client = Raw::with_region(&server, 64);
    client.write(&[(0, 1, 1)]).unwrap();
    let session = client.session;
    drop(client);
    server.wait_until(|stat| stat.orphaned_sessions == 1);
    let mut late = Raw::greeted(&server);
    late.session = session;
    let mut back = late.attach(&server, AttachMode::Join, 0).unwrap();
    assert_eq!(back.read(&[(0, 1)]).unwrap(), [1]);
    assert_eq!(server.stat().orphaned_sessions, 0);
    drop(back);
    server.wait_until_empty_but(1);
    assert_eq!(server.stat().sessions_timed_out, 1);
    assert!(server.logs("freed 1 pages of raw"));
    let gone = late.attach(&server, AttachMode::Join, 0).err();
    assert_eq!(gone, Some(RefusalCode::NoSession));
}

#[test]
fn a_new_connection_replaces_the_old_one() {
    let server = TestServer::start(64, |_| ());
    let mut old = Raw::with_region(&server, 64);
    old.write(&[(0, 1, 1)]).unwrap();
    let mut new = old.attach(&server, AttachMode::Join, old.connection).unwrap();
    // What was still on its way on the old connection comes too late.
    assert_eq!(old.write(&[(0, 2, 2)]), Err(RefusalCode::NotAttached));
    assert_eq!(old.free(0, 1), Err(RefusalCode::NotAttached));
    assert_eq!(new.read(&[(0, 1)]).unwrap(), [1]);
    drop(old);
    server.wait_until(|stat| stat.connections == 2);
    assert_eq!(server.stat().orphaned_sessions, 0);
}

#[test]
fn taking_over_shuts_the_former_writer_out() {
    let server = TestServer::start(64, |_| ());
    let mut old = Raw::with_region(&server, 64);
    old.write(&[(0, 1, 1)]).unwrap();
    let half = old.write_message(&[(0, 2, 2)]);
    std::io::Write::write_all(&mut old.stream, &half[..200]).unwrap();
    let mut new = old.attach(&server, AttachMode::TakeOver, 0).unwrap();
    assert_eq!(new.session.epoch.get(), 2);
    // A write that began in the old epoch ends in the new one: refused all the same.
    std::io::Write::write_all(&mut old.stream, &half[200..]).unwrap();
    assert_eq!(old.receive().0.refusal, Some(RefusalCode::StaleEpoch));
    assert_eq!(old.read(&[(0, 1)]), Err(RefusalCode::StaleEpoch));
    assert_eq!(new.read(&[(0, 1)]).unwrap(), [1]);
    new.write(&[(0, 2, 3)]).unwrap();
    assert_eq!(server.stat().slots, 1);
}

#[test]
fn another_server_process_is_another_incarnation() {
    let mut server = TestServer::start(64, |_| ());
    let old = Raw::with_region(&server, 64).session;
    server.stop();
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::with_region(&server, 64);
    assert_ne!(client.session.incarnation, old.incarnation);
    client.session = old;
    assert_eq!(client.read(&[(0, 0)]), Err(RefusalCode::WrongIncarnation));
    let denied = client.attach(&server, AttachMode::Join, 0).err();
    assert_eq!(denied, Some(RefusalCode::WrongIncarnation));
}

#[test]
fn no_tenant_reads_what_another_one_left() {
    let server = TestServer::start(512, |_| ());
    for round in 0..4u8 {
        let mut client = Raw::with_region(&server, 512);
        let pages: Vec<_> = (0..200).map(|page| (page, 1, 100 + round)).collect();
        client.write(&pages).unwrap();
        for page in 200..512 {
            assert_eq!(client.read(&[(page, 0)]), Err(RefusalCode::NoPage));
        }
        let all: Vec<_> = (0..200).map(|page| (page, 1)).collect();
        assert_eq!(client.read(&all).unwrap(), vec![100 + round; 200]);
        client.call(client.request(Action::Disconnect), |_| ());
    }
}

#[test]
fn stopping_closes_every_connection() {
    let mut server = TestServer::start(64, |config| config.workers = 3);
    let mut clients: Vec<_> = (0..9).map(|_| Raw::with_region(&server, 1)).collect();
    server.stop();
    assert!(clients.iter_mut().all(Raw::is_dropped));
    assert!(!server.path.exists());
}

/// Caps 17, 21: what a forked child inherits is a session of its own, which begins as a copy.
#[test]
fn cap_21_a_session_begins_as_a_copy_of_another() {
    let server = TestServer::start(64, |_| ());
    let mut parent = Raw::with_region(&server, 16);
    parent.write(&[(0, 1, 1), (1, 2, 2), (2, 3, 3)]).unwrap();
    let mut child = Raw::greeted(&server);
    let begin = parent.request(Action::Setup);
    let wrong = farmem_wire::Header { token: begin.token ^ 1, ..begin };
    assert_eq!(child.setup_as(wrong, 16, false, true), Err(RefusalCode::WrongToken));
    // Nor is who only guesses told how much room there is.
    assert_eq!(child.setup_as(wrong, 1 << 30, false, true), Err(RefusalCode::WrongToken));
    assert_eq!(server.stat().reserved_bytes, 16 * 4096);
    // As much is reserved as may be written, which is at least what is inherited.
    let granted = child.setup_as(begin, 1, false, true).unwrap();
    assert_eq!((granted.pages.get(), granted.granted.get()), (16, 16 * 4096));
    let mut large = Raw::with_region(&server, 17);
    let begin_large = large.request(Action::Setup);
    assert_eq!(Raw::greeted(&server).setup_as(begin_large, 1, true, true), Err(RefusalCode::Full));
    let gone = large.request(Action::Disconnect);
    assert_eq!(large.call(gone, |_| ()).0.refusal, None);
    assert_eq!((server.stat().pages, server.stat().slots), (6, 3));
    // Either goes on by itself, also when the other has ended.
    parent.write(&[(0, 4, 4)]).unwrap();
    child.write(&[(1, 4, 5)]).unwrap();
    child.free(2, 1).unwrap();
    assert_eq!(child.read(&[(0, 1), (1, 4)]).unwrap(), [1, 5]);
    assert_eq!(parent.read(&[(0, 4), (1, 2), (2, 3)]).unwrap(), [4, 2, 3]);
    let gone = parent.request(Action::Disconnect);
    assert_eq!(parent.call(gone, |_| ()).0.refusal, None);
    assert_eq!(child.read(&[(0, 1), (1, 4)]).unwrap(), [1, 5]);
    assert_eq!(child.read(&[(2, 0)]), Err(RefusalCode::NoPage));
    let gone = child.request(Action::Disconnect);
    assert_eq!(child.call(gone, |_| ()).0.refusal, None);
    drop((parent, child, large));
    server.wait_until_empty();
}
