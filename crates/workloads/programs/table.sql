-- An in-memory table of a million rows, two indexes, and questions whose answers depend on every
-- row. Run as: sqlite3 :memory: < table.sql
PRAGMA cache_size = -4000000;
CREATE TABLE item (id INTEGER PRIMARY KEY, code INTEGER, note TEXT);
WITH RECURSIVE counter (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter WHERE n < 1000000)
INSERT INTO item
SELECT n, (n * 2654435761) % 4294967291, printf('%016x%016x', n * 1442695040888963407, n * 3037000493)
FROM counter;
CREATE INDEX item_by_code ON item (code);
CREATE INDEX item_by_note ON item (note);
SELECT count(*), sum(code), min(note), max(note) FROM item;
SELECT sum(a.code) FROM item AS a JOIN item AS b ON b.code = (a.code * 7) % 4294967291;
UPDATE item SET note = substr(note, 17) || substr(note, 1, 16) WHERE code % 3 = 0;
DELETE FROM item WHERE code % 7 = 0;
SELECT count(*), sum(length(note)), min(note), max(note) FROM item;
SELECT id, code, note FROM item WHERE note > '8' ORDER BY note LIMIT 5;
PRAGMA integrity_check;
