//! Why a server refuses, and what the client is to do about it.

/// What a refused client does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// The same request may succeed a little later.
    Retry,
    /// The client's knowledge (layout, epoch, session) is out of date: get it anew first.
    Refresh,
    /// It will never succeed.
    GiveUp,
}

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $advice:ident, $text:literal;)*) => {
        /// Status of a refusing reply. Numbers are permanent.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum RefusalCode {
            $($(#[$doc])* $name,)*
            /// A code that this version of the program does not know.
            Unknown(u16),
        }

        impl RefusalCode {
            /// Every code that this version knows.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// From the number in a header, which is not 0 (0 is success).
            #[must_use]
            pub const fn from_number(number: u16) -> Self {
                match number {
                    $($number => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }

            /// The number in a header.
            #[must_use]
            pub const fn number(self) -> u16 {
                match self {
                    $(Self::$name => $number,)*
                    Self::Unknown(number) => number,
                }
            }

            /// A word for programs, in lower case.
            #[must_use]
            pub fn name(self) -> String {
                match self {
                    $(Self::$name => crate::snake_case(stringify!($name)),)*
                    Self::Unknown(_) => "unknown".to_owned(),
                }
            }

            /// What the client does next.
            #[must_use]
            pub const fn advice(self) -> Advice {
                match self {
                    $(Self::$name => Advice::$advice,)*
                    Self::Unknown(_) => Advice::GiveUp,
                }
            }

            /// What happened, for people.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Unknown(_) => "a reason that this version does not know",
                }
            }
        }
    };
}

refusals! {
    /// The server does not know the action; the connection stays.
    Unsupported = 1, GiveUp, "the server does not know this action";
    /// The hello offers no version that the server speaks.
    WrongVersion = 2, GiveUp, "no protocol version in common";
    /// The first message of a connection must be a hello.
    HelloFirst = 3, GiveUp, "the connection has not said hello";
    /// Fields contradict each other or a limit.
    Malformed = 4, GiveUp, "the request makes no sense";
    /// A named limit of the server is reached for now.
    Busy = 5, Retry, "a limit of the server is reached for now";
    /// No room for what was asked. The body gives bytes asked and free.
    Full = 6, GiveUp, "the server has no room";
    /// No such session: disconnected, timed out, or never there.
    NoSession = 7, GiveUp, "no such session";
    /// The token does not belong to the session.
    WrongToken = 8, GiveUp, "the token does not belong to the session";
    /// The session is not attached to this connection, or another connection took its place.
    NotAttached = 9, Refresh, "the session is not attached to this connection";
    /// A newer writer has attached; this epoch may not be used any more.
    StaleEpoch = 10, Refresh, "the epoch is over: another client has attached for writing";
    /// The request is meant for a server process that is no more.
    WrongIncarnation = 11, GiveUp, "the server has restarted since";
    /// No such region in the session.
    NoRegion = 12, GiveUp, "no such region";
    /// A page lies outside of the region.
    OutOfBounds = 13, GiveUp, "a page lies outside of the region";
    /// The page was never written, or was freed. Never to be taken for a page of zeros.
    NoPage = 14, GiveUp, "no such page";
    /// The stored page has another version than the one asked for.
    WrongVersionOfPage = 15, GiveUp, "the page has another version";
    /// A write's version is not greater than the stored one.
    OldVersion = 16, GiveUp, "a newer version of the page is stored";
    /// What was stored does not match the client's checksum: it was damaged on the way.
    WrongChecksum = 17, Retry, "the page was damaged on its way";
    /// Credentials are needed, or those given are wrong.
    Unauthorised = 18, GiveUp, "the credentials were not accepted";
    /// A slot that is not assigned to the session.
    NoSlot = 19, Refresh, "the slot is not assigned to the session";
    /// A region of this name exists already.
    NameTaken = 20, GiveUp, "a region of this name exists already";
    /// The region is a snapshot.
    Frozen = 21, GiveUp, "the region is a snapshot and cannot be changed";
    /// Pages that are pinned cannot be given up.
    Pinned = 22, GiveUp, "pages of the region are pinned: unpin them first";
    /// The file lies outside of the directories that the server may use, or cannot be opened.
    NoFile = 23, GiveUp, "the server may not use the file, or cannot open it";
    /// The backing file cannot be read or written: it was truncated, or its disk failed.
    FileFailed = 24, GiveUp, "the backing file cannot be read or written where it should be";
    /// A slower tier does not give a page back as it was put there.
    TierFailed = 25, GiveUp, "a slower tier of the server has lost the page";
    /// What was there before still is.
    DiskFull = 26, GiveUp, "the disk of the server has no room for it: what was there still is";
    /// A backup's table or a page of it is damaged, or a file of it is gone.
    BadBackup = 27, GiveUp, "the backup is damaged or not whole";
    /// Written by a version of farmem that this one does not know.
    BackupVersion = 28, GiveUp, "the backup was written by another version of farmem";
    /// Pages that are to be freed are free already.
    AlreadyFree = 29, GiveUp, "nothing is stored there: it was freed before, or never written";
    /// The region was copied, and who deletes it has not said that the copies keep what they share.
    Copied = 30, GiveUp, "the region has copies: delete them first, or let them keep what they share";
    /// The memory server that a region is made from does not answer, or refuses.
    SourceAway = 31, Retry, "the memory server that the region is made from does not give what it holds";
    /// A tier that is preferred is not there.
    NoTier = 32, GiveUp, "the server was started without such a tier";
    /// A range of a file overlaps one that another region has. The body says which.
    RangeTaken = 33, GiveUp, "another region has a part of that range of the file: choose another offset";
    /// The own range of a clone does not hold yet what the clone inherited.
    Unfilled = 34, GiveUp, "the region's own range of its file does not hold yet what it inherited: flush it first";
    /// More ranges of the region would be pinned, or have a preference, than are kept apart.
    TooManyRanges = 35, GiveUp, "too many ranges of the region are pinned, or have a preference, apart: treat neighbours alike";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_are_not_reused() {
        let mut seen = std::collections::HashSet::new();
        for code in RefusalCode::ALL {
            assert_eq!(RefusalCode::from_number(code.number()), *code);
            assert!(code.number() != 0 && seen.insert(code.number()));
        }
        assert_eq!(RefusalCode::WrongVersionOfPage.name(), "wrong_version_of_page");
        assert_eq!(RefusalCode::from_number(9999), RefusalCode::Unknown(9999));
        assert_eq!(RefusalCode::Unknown(9999).number(), 9999);
    }
}
