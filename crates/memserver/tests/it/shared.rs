//! Slots that a client writes into by itself, and commits.

use farmem_region::{Checksum, PAGE_SIZE, PageIndex, Version};
use farmem_wire::{
    Action, AttachMode, Header, Hello, PageEntry, RefusalCode, SLOTS_ASSIGNED_MAX, Slots,
    page_checksum,
};

use crate::raw::{Raw, TestServer};

fn start() -> TestServer {
    TestServer::start(1024, |config| config.share_arena = true)
}

/// Says hello anew, as a client that shares the arena. The descriptor that comes is dropped.
fn sharing(server: &TestServer, pages: u64) -> Raw {
    let mut client = Raw::silent(server);
    let hello = Hello { oldest: 1, newest: 1, share_arena: true };
    client.call(Header::request(Action::Hello, 0), |out| hello.encode(out));
    client.setup(pages, false, false).unwrap();
    client.malloc(0, pages).unwrap();
    client
}

fn assign(client: &mut Raw, wanted: u32) -> Result<Vec<u32>, RefusalCode> {
    let (header, body) = client.call(client.request(Action::Slots), |out| {
        Slots { wanted }.encode(out);
    });
    header.refusal.map_or_else(|| Ok(Slots::decode_assigned(&body).collect()), Err)
}

/// A page of zeros, as fresh memory has them.
fn zeros(client: &Raw, page: u64, version: u64, slot: u32) -> PageEntry {
    let (page, version) = (PageIndex::new(page), Version::new(version));
    let checksum = page_checksum(client.session.region, page, version, &[0; PAGE_SIZE]);
    PageEntry { page, version, checksum, slot }
}

fn commit(client: &mut Raw, entries: &[PageEntry]) -> Result<Vec<u32>, RefusalCode> {
    let header = Header { entries: entries.len() as u32, ..client.request(Action::Commit) };
    let (reply, body) = client.call(header, |out| {
        entries.iter().for_each(|entry| entry.encode(out));
    });
    reply.refusal.map_or_else(|| Ok(Slots::decode_assigned(&body).collect()), Err)
}

#[test]
fn a_commit_uses_its_slots_up_and_brings_as_many() {
    let server = start();
    let mut client = sharing(&server, 1000);
    let slots = assign(&mut client, 4).unwrap();
    assert_eq!(slots.len(), 4);
    let entries = [zeros(&client, 0, 1, slots[0]), zeros(&client, 999, 1, slots[1])];
    let fresh = commit(&mut client, &entries).unwrap();
    assert_eq!(fresh.len(), 2);
    assert!(fresh.iter().all(|slot| !slots.contains(slot)));
    assert_eq!(client.read(&[(0, 1), (999, 1)]).unwrap(), [0, 0]);
    // Once more, as after a reconnect: nothing changes.
    assert!(commit(&mut client, &entries).unwrap().is_empty());
    let mut all = assign(&mut client, 4).unwrap();
    all.sort_unstable();
    let mut expected = [slots[2], slots[3], fresh[0], fresh[1]];
    expected.sort_unstable();
    assert_eq!(all, expected);
    let stat = server.stat();
    assert_eq!((stat.pages, stat.slots), (2, 6));
    client.call(client.request(Action::Disconnect), |_| ());
    drop(client);
    server.wait_until_empty();
}

#[test]
fn what_does_not_match_its_checksum_is_not_committed() {
    let server = start();
    let mut client = sharing(&server, 16);
    let slots = assign(&mut client, 2).unwrap();
    let right = zeros(&client, 0, 1, slots[0]);
    let wrong = PageEntry { checksum: Checksum::new(1), ..zeros(&client, 1, 1, slots[1]) };
    assert_eq!(commit(&mut client, &[right, wrong]), Err(RefusalCode::WrongChecksum));
    assert_eq!(client.read(&[(0, 0)]), Err(RefusalCode::NoPage));
    let misplaced = PageEntry { page: PageIndex::new(2), ..right };
    assert_eq!(commit(&mut client, &[misplaced]), Err(RefusalCode::WrongChecksum));
    let outside = zeros(&client, 16, 1, slots[0]);
    assert_eq!(commit(&mut client, &[outside]), Err(RefusalCode::OutOfBounds));
    commit(&mut client, &[right]).unwrap();
}

#[test]
fn only_slots_of_the_session_can_be_committed() {
    let server = start();
    let mut client = sharing(&server, 16);
    let mut other = sharing(&server, 16);
    let own = assign(&mut client, 1).unwrap()[0];
    let foreign = assign(&mut other, 1).unwrap()[0];
    other.write(&[(0, 1, 9)]).unwrap();
    for slot in [foreign, foreign + 1, u32::MAX] {
        let entry = zeros(&client, 0, 1, slot);
        assert_eq!(commit(&mut client, &[entry]), Err(RefusalCode::NoSlot));
    }
    // One slot cannot hold two pages: the second one is refused.
    let twice = [zeros(&client, 0, 1, own), zeros(&client, 1, 1, own)];
    assert_eq!(commit(&mut client, &twice), Err(RefusalCode::NoSlot));
    assert_eq!(client.read(&[(1, 0)]), Err(RefusalCode::NoPage));
    assert_eq!(other.read(&[(0, 1)]).unwrap(), [9]);
    assert_eq!(server.stat().pages, 2, "what was stored before the refusal is counted");
    let mut joined = client.attach(&server, AttachMode::Join, 0).unwrap();
    assert_eq!(assign(&mut joined, 1), Err(RefusalCode::Unsupported), "it was given no file");
}

#[test]
fn slots_are_limited() {
    let server = start();
    let mut client = sharing(&server, 16);
    assert_eq!(assign(&mut client, u32::MAX).unwrap().len(), SLOTS_ASSIGNED_MAX);
    assert_eq!(assign(&mut client, u32::MAX).unwrap().len(), SLOTS_ASSIGNED_MAX);
    assert_eq!(server.stat().slots, SLOTS_ASSIGNED_MAX as u64);
}

#[test]
fn a_server_that_does_not_share_assigns_nothing() {
    let server = TestServer::start(64, |_| ());
    let mut client = sharing(&server, 16);
    assert_eq!(assign(&mut client, 1), Err(RefusalCode::Unsupported));
}
