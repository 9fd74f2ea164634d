//! A server hands over to another one, which is in this process too, or fails to.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use farmem_memserver::{FileTierConfig, HandOverError, Handed, ServerConfig, ServerError};
use farmem_region::{ByteCount, PAGE_SIZE, PageCount};
use farmem_transport::{Arrival, Endpoint, Passage};
use farmem_wire::{Action, AttachMode, PAGE_SIZES, Source};

use crate::model::Model;
use crate::raw::{Raw, TestServer, patiently};
use crate::restart::{configured, in_memory, started};
use crate::tiers::content;

fn pages(count: u64) -> ByteCount {
    PageCount::new(count).bytes()
}

/// Room for all that the model may write: more of it is acknowledged than where servers are killed.
fn roomy(config: &mut ServerConfig) {
    config.tiers.file.as_mut().unwrap().size = pages(16 << 10);
}

/// A server that keeps nothing on disk but its file tier, which has no name.
fn in_memory_only(place: &Path) -> TestServer {
    let mut server = TestServer::start(256, |config| {
        let log = config.log.clone();
        let Endpoint::Unix(socket) = config.listen[0].clone() else {
            unreachable!("it is a Unix socket");
        };
        *config = configured(socket, &place.join("data"));
        roomy(config);
        config.data = None;
        config.log = log;
    });
    server.hands_over = true;
    server
}

/// All operations at random, handed over in the midst of writes again and again: nothing that was
/// acknowledged is lost, with and without a directory for data.
#[test]
fn cap_95_every_operation_agrees_with_a_plain_vector_though_the_server_hands_over() {
    for (seed, page_bytes) in (0..).zip(PAGE_SIZES) {
        let place = in_memory();
        let mut server = match seed % 2 {
            0 => in_memory_only(place.path()),
            _ => started(place.path(), roomy),
        };
        server.hands_over = true;
        let files = (page_bytes < 2 << 20).then(|| place.path());
        let mut model = Model::new(&server, 177 + seed, page_bytes, files);
        model.backups = Some(place.path().canonicalize().unwrap());
        model.run(2000);
        drop(model);
        server.wait_until_empty();
    }
}

/// Sessions, named regions, copies, pins, files and the incarnation are there; tokens are, so that
/// clients go on without asking.
#[test]
fn cap_95_a_successor_has_all_that_its_predecessor_had() {
    let place = in_memory();
    std::fs::write(place.path().join("table"), [7; 64 * PAGE_SIZE]).unwrap();
    let table = place.path().join("table");
    let server = in_memory_only(place.path());
    let mut admin = Raw::greeted(&server);
    let source = Source::File { path: table.to_str().unwrap(), offset: 0 };
    admin.create("file", 64 * PAGE_SIZE as u64, 4096, source).unwrap();
    let mut file = Raw::opened(&server, "file").unwrap();
    file.write(&[(3, 1, 33), (4, 1, 44)]).unwrap();
    file.copy(Action::Clone, "copy", false).unwrap();
    file.write(&[(4, 2, 45)]).unwrap();
    file.over(Action::Pin, 8, 8).unwrap();
    let mut client = Raw::with_region(&server, 900);
    for page in 0..900 {
        client.write_pages(&[(page, 1, content(page, 1, page % 2 == 0))]).unwrap();
    }
    let before = (file.show(), server.stat());
    for _ in 0..5 {
        server.hand_over();
        client = client.attach(&server, AttachMode::Join, client.connection).unwrap();
    }
    let mut file = file.attach(&server, AttachMode::Join, file.connection).unwrap();
    assert_eq!(file.session.incarnation, admin.session.incarnation);
    let (now, stat) = (file.show(), server.stat());
    assert_eq!((now.dirty, now.pinned, now.stored), {
        let info = &before.0;
        (info.dirty, info.pinned, info.stored)
    });
    assert_eq!(stat.reserved_bytes, before.1.reserved_bytes);
    assert_eq!((stat.pages, stat.regions), (before.1.pages, before.1.regions));
    assert_eq!(file.read(&[(3, 1), (4, 2), (5, 0)]), Ok(vec![33, 45, 7]));
    let mut copy = Raw::opened(&server, "copy").unwrap();
    assert_eq!(copy.read(&[(3, 1), (4, 1), (5, 0)]), Ok(vec![33, 44, 7]));
    for page in 0..900 {
        let found = client.read_page(page).unwrap();
        assert!(found == (1, content(page, 1, page % 2 == 0).to_vec()), "page {page}");
    }
    for client in [file, copy] {
        let _ = Raw::opened(&server, "file").map(|mut file| file.over(Action::Unpin, 8, 8));
        drop(client);
    }
    for name in ["copy", "file"] {
        let mut region = Raw::opened(&server, name).unwrap();
        let delete = || {
            let (header, _) = region.call(region.request(Action::Delete), |_| ());
            header.refusal.map_or(Ok(()), Err)
        };
        assert_eq!(patiently(delete), Ok(()));
    }
    client.call(client.request(Action::Disconnect), |_| ());
    drop((client, admin));
    server.wait_until_empty();
}

/// Whoever connects meanwhile waits, and is served.
#[test]
fn cap_95_nobody_is_refused_a_connection_while_servers_hand_over() {
    let place = in_memory();
    let server = in_memory_only(place.path());
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let stream = std::os::unix::net::UnixStream::connect(&server.path);
                    stream.expect("it is not refused");
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
        for _ in 0..20 {
            server.hand_over();
            server.wait_until_served();
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(server.path.exists());
}

/// What a successor does that does not go on, and what is said of it.
type Failure<'a> = (&'static str, Box<dyn Fn(&Passage) + 'a>);

fn says(passage: &Passage, kind: u32, rest: &[u8]) {
    let packet = [&b"FMHANDOV"[..], &kind.to_le_bytes(), rest].concat();
    passage.send(&packet, &[]).unwrap();
}

fn hello(passage: &Passage, version: u32, records: u32) {
    says(passage, 1, &[version, records].map(u32::to_le_bytes).concat());
}

/// Gets all that the predecessor has.
fn given(passage: &Passage) {
    hello(passage, 1, 5);
    match passage.receive(None).unwrap() {
        Arrival::Packet(bytes, passed) => {
            assert!(passed.len() >= 3 && bytes[8] == 2, "{bytes:?}");
        }
        other => panic!("{other:?}"),
    }
}

fn failures(data: Option<&Path>) -> Vec<Failure<'_>> {
    vec![
        ("ended", Box::new(|_| ())),
        ("does not understand", Box::new(|passage| passage.send(b"hello", &[]).unwrap())),
        ("version 2.2", Box::new(|passage| hello(passage, 2, 2))),
        ("version 1.99", Box::new(|passage| hello(passage, 1, 99))),
        ("ended", Box::new(given)),
        (
            "cannot do it",
            Box::new(|passage| {
                given(passage);
                says(passage, 6, b"cannot do it");
            }),
        ),
        (
            // Even after it was told to go on, with its journal in place.
            "ended",
            Box::new(move |passage| {
                given(passage);
                says(passage, 3, &[]);
                assert!(matches!(passage.receive(None), Ok(Arrival::Packet(..))));
                if let Some(data) = data {
                    std::fs::copy(data.join("journal"), data.join("journal.new")).unwrap();
                    std::fs::rename(data.join("journal.new"), data.join("journal")).unwrap();
                }
            }),
        ),
    ]
}

/// A successor that ends, refuses or talks nonsense at any point leaves the predecessor serving, with
/// all that it held.
#[test]
fn cap_95_a_successor_that_fails_leaves_the_predecessor_serving() {
    let place = in_memory();
    let data = place.path().join("data");
    for data in [None, Some(data.as_path())] {
        let start = || match data {
            None => in_memory_only(place.path()),
            Some(_) => started(place.path(), |_| ()),
        };
        let server = start();
        let mut client = Raw::with_region(&server, 300);
        let check = |client: &mut Raw, pages: u64| {
            for page in 1..=pages {
                let expected = (page, content(page, page, true).to_vec());
                assert!(client.read_page(page) == Ok(expected), "page {page}");
            }
        };
        for (round, (expected, successor)) in (1..).zip(failures(data)) {
            client.write_pages(&[(round, round, content(round, round, true))]).unwrap();
            let (ours, theirs) = Passage::pair().unwrap();
            let handle = server.handle();
            let asked = std::thread::spawn(move || handle.hand_over(ours));
            successor(&theirs);
            drop(theirs);
            match asked.join().unwrap() {
                Err(error) => assert!(error.to_string().contains(expected), "{error}"),
                // It had said hello: the rest is in the log.
                Ok(()) => assert!(server.logs(expected), "{expected}"),
            }
            client = client.attach(&server, AttachMode::Join, client.connection).unwrap();
            check(&mut client, round);
        }
        // And good ones after all of those.
        for _ in 0..2 {
            server.hand_over();
            client = client.attach(&server, AttachMode::Join, client.connection).unwrap();
            check(&mut client, 7);
        }
        if data.is_some() {
            drop(server);
            let server = start();
            let client = client.attach(&server, AttachMode::Join, client.connection);
            check(&mut client.unwrap(), 7);
        }
    }
}

/// What is noted by a predecessor that goes on is what a later process finds.
#[test]
fn cap_95_a_server_that_goes_on_after_a_failed_hand_over_keeps_its_journal() {
    let place = in_memory();
    let server = started(place.path(), |_| ());
    let mut client = Raw::with_region(&server, 300);
    client.write(&[(1, 1, 1)]).unwrap();
    let (ours, theirs) = Passage::pair().unwrap();
    let handle = server.handle();
    let asked = std::thread::spawn(move || handle.hand_over(ours));
    let handed = Handed::receive(theirs).unwrap();
    asked.join().unwrap().unwrap();
    drop(handed);
    client = client.attach(&server, AttachMode::Join, client.connection).unwrap();
    client.write(&[(1, 2, 2), (2, 1, 3)]).unwrap();
    drop(server);
    let server = started(place.path(), |_| ());
    let mut client = client.attach(&server, AttachMode::Join, client.connection).unwrap();
    assert_eq!(client.read(&[(1, 2), (2, 1)]), Ok(vec![2, 3]));
}

/// What does not fit is refused by the successor with words, and the predecessor goes on.
#[test]
fn cap_95_a_successor_that_does_not_fit_refuses() {
    let place = in_memory();
    let check = |server: &TestServer, expected: &str, change: &dyn Fn(&mut ServerConfig)| {
        let mut client = Raw::with_region(server, 10);
        client.write(&[(1, 1, 1)]).unwrap();
        let refused = server.try_hand_over(|config| change(config)).unwrap_err();
        let ServerError::HandOver(refused @ HandOverError::DoesNotFit(_)) = refused else {
            panic!("{refused}");
        };
        assert!(refused.to_string().contains(expected), "{refused}");
        assert!(server.logs(expected), "{expected}");
        let mut client = client.attach(server, AttachMode::Join, client.connection).unwrap();
        assert_eq!(client.read(&[(1, 1)]), Ok(vec![1]));
        client.call(client.request(Action::Disconnect), |_| ());
    };
    let server = in_memory_only(place.path());
    let data = place.path().join("data");
    check(&server, "leave it out", &|config| config.memory = pages(257));
    check(&server, "has no --data", &|config| config.data = Some(data.clone()));
    // Pages lie in the file.
    let mut client = Raw::with_region(&server, 2000);
    for page in 0..1500 {
        client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
    }
    check(&server, "the same --tier file", &|config| config.tiers.file = None);
    check(&server, "at least as large", &|config| {
        let directory = place.path().to_owned();
        config.tiers.file = Some(FileTierConfig { directory, size: pages(10) });
    });
    drop(server);
    let server = started(place.path(), |_| ());
    check(&server, "at least that", &|config| config.memory = pages(100));
    check(&server, "give the same directory", &|config| config.data = None);
    check(&server, "--data stays", &|config| config.data = Some(place.path().join("other")));
    // More is fine where the memory is a file.
    server.try_hand_over(|config| config.memory = pages(5000)).unwrap();
    assert_eq!(server.stat().memory_bytes, pages(5000).get());
}

/// An address that the successor has not is not listened at any more, a new one is.
#[test]
fn a_successor_listens_where_it_is_told_to() {
    let place = in_memory();
    let other = place.path().join("other");
    let server = in_memory_only(place.path());
    let first = server.path.clone();
    server.try_hand_over(|config| config.listen.push(Endpoint::Unix(other.clone()))).unwrap();
    assert!(first.exists() && other.exists());
    server.try_hand_over(|config| drop(config.listen.pop())).unwrap();
    assert!(first.exists() && !other.exists());
    assert_eq!(server.wait_until_served().sessions, 0);
}

/// Two at a time would be one too many.
#[test]
fn a_second_hand_over_at_a_time_is_refused() {
    let server = TestServer::start(64, |_| ());
    let handle = server.handle();
    let silent = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        // Its successor never says hello, until it is gone.
        let first = scope.spawn(|| {
            loop {
                let (ours, theirs) = Passage::pair().unwrap();
                silent.lock().unwrap().push(theirs);
                match handle.hand_over(ours) {
                    Err(HandOverError::NotNow(_)) => {}
                    other => return other,
                }
            }
        });
        loop {
            let (ours, _) = Passage::pair().unwrap();
            match handle.hand_over(ours) {
                Err(HandOverError::Gone) => {}
                Err(HandOverError::NotNow(text)) => break assert!(text.contains("under way")),
                other => panic!("{other:?}"),
            }
        }
        silent.lock().unwrap().clear();
        assert!(matches!(first.join().unwrap(), Err(HandOverError::Gone)));
    });
    server.hand_over();
    assert_eq!(server.stat().sessions, 0);
}
