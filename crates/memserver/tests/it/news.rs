//! What a region's writer changes reaches those who keep a copy of its map, ahead of replies to what they
//! ask anyway.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use farmem_region::PageIndex;
use farmem_wire::{
    Action, AskMap, HEADER_BYTES, Header, MapChange, MapReply, NEWS_MAX, Open, PageEntry,
    RefusalCode, Source, seal,
};

use crate::raw::{Raw, TestServer, patiently};

/// From a page on so many are stored in a version, or absent.
type Change = (u64, u64, Option<u64>);

/// A message of news.
struct News {
    changes: Vec<Change>,
    body: MapReply,
}

impl Raw {
    /// Another client of a region, which changes nothing.
    pub(crate) fn joined(server: &TestServer, name: &str) -> Self {
        let mut client = Self::greeted(server);
        let open = Open { take_over: false, name };
        let (reply, _) = client.call(Header::request(Action::Open, 0), |out| open.encode(out));
        assert_eq!(reply.refusal, None);
        client.session = reply;
        client
    }

    /// Asks for the map, and to be told what changes of it. Returns the pages that are stored, and
    /// whether the client holds a lease.
    fn listen(&mut self) -> (BTreeMap<u64, u64>, bool) {
        let (mut pages, mut from, mut leased) = (BTreeMap::new(), PageIndex::new(0), true);
        loop {
            let ask = AskMap { from, since: 0, leases: true, news: true };
            let (news, reply, entries, body) = self.hear(Action::Map, |out| ask.encode(out));
            assert!(news.is_none(), "all of it is in the map");
            leased &= reply.leased;
            let told = PageEntry::decode_all(&entries);
            pages.extend(told.map(|entry| (entry.page.get(), entry.version.get())));
            match MapReply::decode(&body).unwrap().next {
                Some(next) => from = next,
                None => return (pages, leased),
            }
        }
    }

    /// Asks for something; returns the reply, and what came ahead of it.
    fn hear(
        &mut self,
        action: Action,
        rest: impl FnOnce(&mut Vec<u8>),
    ) -> (Option<News>, Header, Vec<u8>, Vec<u8>) {
        let request = 1 << 40;
        let mut message = vec![0; HEADER_BYTES];
        rest(&mut message);
        let entries = if action == Action::Read { 1 } else { 0 };
        seal(Header { request, entries, ..self.request(action) }, &mut message);
        self.stream.write_all(&message).unwrap();
        let mut news = None;
        loop {
            let mut head = [0; HEADER_BYTES];
            self.stream.read_exact(&mut head).unwrap();
            let header = Header::decode(&head).unwrap();
            assert_eq!((header.reply, header.request), (true, request));
            let mut entries = vec![0; header.entry_bytes()];
            self.stream.read_exact(&mut entries).unwrap();
            let mut body = vec![0; header.payload_bytes()];
            self.stream.read_exact(&mut body).unwrap();
            if !header.news {
                return (news, header, entries, body);
            }
            assert_eq!((header.action, header.refusal), (Action::Map, None));
            let changes: Vec<_> = MapChange::decode_all(&entries)
                .map(|change| {
                    let version = change.version.map(|version| version.get());
                    (change.range.start.get(), change.range.count.get(), version)
                })
                .collect();
            assert!(changes.len() <= NEWS_MAX);
            let body = MapReply::decode(&body).unwrap();
            assert!(news.replace(News { changes, body }).is_none(), "one for each reply");
        }
    }

    /// What has come with the reply to a ping, and whether that gives a lease.
    fn news(&mut self) -> (Option<Vec<Change>>, bool) {
        let (news, reply, ..) = self.hear(Action::Ping, |_| ());
        (news.map(|news| news.changes), reply.leased)
    }
}

fn start() -> TestServer {
    TestServer::start(8192, |config| config.promise_percent = 10_000)
}

/// A server with a region, its writer, and a reader that has the map.
fn two_clients(server: &TestServer) -> (Raw, Raw) {
    Raw::greeted(server).create("r", 64 << 20, 4096, Source::Fill(7)).unwrap();
    let mut writer = Raw::opened(server, "r").unwrap();
    writer.write(&[(3, 1, 3)]).unwrap();
    let mut reader = Raw::joined(server, "r");
    let (pages, leased) = reader.listen();
    assert_eq!((pages, leased), (BTreeMap::from([(3, 1)]), true));
    (writer, reader)
}

#[test]
fn cap_93_what_another_client_changes_rides_on_replies() {
    let server = start();
    let (mut writer, mut reader) = two_clients(&server);
    assert_eq!(reader.news(), (None, true), "nothing has changed");
    // The change waits for the reader's lease, and the reader gets none before it is made.
    patiently(|| {
        assert_eq!(reader.news().0, None);
        writer.write(&[(5, 2, 5), (6, 2, 6)])
    })
    .unwrap();
    let (news, reply, ..) = reader.hear(Action::Read, |out| {
        PageEntry { page: PageIndex::new(5), ..PageEntry::default() }.encode(out);
    });
    assert_eq!(news.map(|news| news.changes), Some(vec![(5, 2, Some(2))]));
    assert!(reply.leased, "it is up to date without asking for the map");
    assert_eq!(reader.news(), (None, true), "it is told once");
    // So it goes with what is forgotten.
    patiently(|| writer.over(Action::Invalidate, 0, 1024)).unwrap();
    assert_eq!(reader.news(), (Some(vec![(0, 1024, None)]), true));
    // What only the server notices is no news: that a page was made, or moves.
    writer.over(Action::Initialise, 0, 2).unwrap();
    writer.read(&[(0, 0), (9, 0)]).unwrap();
    assert_eq!(reader.news(), (None, true));
    // The writer knows what it does itself.
    let (_, leased) = writer.listen();
    assert!(leased);
    patiently(|| writer.write(&[(8, 3, 8)])).unwrap();
    assert_eq!(writer.news().0, None);
    assert_eq!(reader.news().0, Some(vec![(8, 1, Some(3))]));
}

#[test]
fn cap_93_news_are_bounded_and_who_is_far_behind_asks_for_the_map_again() {
    let server = start();
    let (mut writer, mut reader) = two_clients(&server);
    let write = |writer: &mut Raw, pages: std::ops::Range<u64>| {
        for page in pages {
            patiently(|| writer.write(&[(2 * page, page, 1)])).unwrap();
        }
    };
    write(&mut writer, 100..200);
    let (first, leased) = reader.news();
    assert_eq!((first.unwrap().len(), leased), (NEWS_MAX, false), "there is more");
    let (second, leased) = reader.news();
    assert_eq!((second.unwrap().len(), leased), (100 - NEWS_MAX, true));
    write(&mut writer, 200..1000);
    let (news, reply, ..) = reader.hear(Action::Ping, |_| ());
    assert!(news.is_some_and(|news| news.body.is_outdated && news.changes.is_empty()));
    assert!(!reply.leased);
    assert_eq!(reader.news(), (None, false), "nothing is told before it asks");
    let (pages, leased) = reader.listen();
    assert_eq!((pages.len(), leased), (901, true));
    assert_eq!(reader.news(), (None, true));
    // A region that becomes smaller is looked at as a whole again.
    patiently(|| writer.resize(1024)).unwrap();
    let (news, ..) = reader.hear(Action::Ping, |_| ());
    assert!(news.is_some_and(|news| news.body.is_outdated));
    // Who leaves is forgotten, and a refused request has nothing riding on it that is not so.
    drop(reader);
    write(&mut writer, 1..300);
    assert_eq!(writer.read(&[(5000, 0)]), Err(RefusalCode::OutOfBounds));
}
