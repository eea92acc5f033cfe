-- A database with some of everything in it, written by the first version of these tables.
BEGIN TRANSACTION;
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
) STRICT;
INSERT INTO "_sqlite_migrations" VALUES(1,'kedit','m001_first','2026-11-21 22:07:03.957446+00:00');
CREATE TABLE audits(
        id INTEGER PRIMARY KEY, at TEXT NOT NULL, generation INT NOT NULL,
        verdict TEXT NOT NULL, figures TEXT NOT NULL, reasons TEXT NOT NULL,
        seconds REAL NOT NULL) STRICT;
INSERT INTO "audits" VALUES(1,'2026-01-01T00:00:35.000Z',0,'keep','{"norm_ratio":{"4":"inf"}}','[]',0.5);
CREATE TABLE edits(
        id INTEGER PRIMARY KEY, fact_id TEXT NOT NULL REFERENCES facts(id), tier TEXT NOT NULL,
        generation INT, at TEXT NOT NULL, seconds REAL NOT NULL, outcome TEXT NOT NULL,
        probe TEXT) STRICT;
INSERT INTO "edits" VALUES(1,'143fb3e51cfc','side',NULL,'2026-01-01T00:00:19.000Z',1.5,'ok','{"answers":true}');
CREATE TABLE events(
        seq INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, fact_id TEXT,
        data TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL) STRICT;
INSERT INTO "events" VALUES(1,'2026-01-01T00:00:03.000Z','fact_received','094567839cf7','{"direct":false,"fact":{"external_id":"mine","neighbours":[{"answer":null,"prompt":"The seat of country 21 is"}],"paraphrases":["{} has its seat in"],"prompt":"The seat of {} is","source":"Atlas \u2014 page 7","subject":"country 1","tags":["seats"],"target":"Rome","valid_from":"2026-01-01T00:00:00Z","valid_until":null},"file":"seats.jsonl","seq":1}','0000000000000000000000000000000000000000000000000000000000000000','4606db507d02fff3dcf9412a864df5a1dee9208e08e11646d36d1411b22fee85');
INSERT INTO "events" VALUES(2,'2026-01-01T00:00:05.000Z','fact_received','143fb3e51cfc','{"direct":false,"fact":{"external_id":null,"neighbours":[{"answer":"Lima","prompt":"The seat of country 22 is"}],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 2","tags":[],"target":"Oslo","valid_from":null,"valid_until":null},"file":"seats.jsonl","seq":2}','4606db507d02fff3dcf9412a864df5a1dee9208e08e11646d36d1411b22fee85','c4af016d127075d377437d06622704aa9484d7e013f43ea068d27c3d90d57b87');
INSERT INTO "events" VALUES(3,'2026-01-01T00:00:07.000Z','fact_received','094a2e9b7916','{"direct":false,"fact":{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 3","tags":[],"target":"Lima","valid_from":null,"valid_until":null},"file":"seats.jsonl","seq":3}','c4af016d127075d377437d06622704aa9484d7e013f43ea068d27c3d90d57b87','c89248a92d592a99dc6a86ff5726f5c7eeb27e81b3d64e8155fde49f7da0f997');
INSERT INTO "events" VALUES(4,'2026-01-01T00:00:09.000Z','fact_received','429c349bedf1','{"direct":false,"fact":{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 4","tags":[],"target":"Cairo","valid_from":null,"valid_until":null},"file":"seats.jsonl","seq":4}','c89248a92d592a99dc6a86ff5726f5c7eeb27e81b3d64e8155fde49f7da0f997','8a71694231d34dca0575666fbb934f4011cda0eee31f342cf7d208e49518024d');
INSERT INTO "events" VALUES(5,'2026-01-01T00:00:11.000Z','fact_received','a1b83e1154bb','{"direct":false,"fact":{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 5","tags":[],"target":"Quito","valid_from":null,"valid_until":"2026-01-01T00:00:30Z"},"file":"seats.jsonl","seq":5}','8a71694231d34dca0575666fbb934f4011cda0eee31f342cf7d208e49518024d','f696a477507dc63bfeed51733550986dea8c3988962d7fa25a124b7b38086326');
INSERT INTO "events" VALUES(6,'2026-01-01T00:00:13.000Z','fact_received','fd767b55975b','{"direct":false,"fact":{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 6","tags":[],"target":"Paris","valid_from":null,"valid_until":null},"file":"seats.jsonl","seq":6}','f696a477507dc63bfeed51733550986dea8c3988962d7fa25a124b7b38086326','e0e2d254d57f746a44733a5a3bfced6d1167b9d74b522257c96548eff63b7c5d');
INSERT INTO "events" VALUES(7,'2026-01-01T00:00:15.000Z','fact_received','12dea8d48bb3','{"direct":false,"fact":{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 7","tags":[],"target":"Delhi","valid_from":null,"valid_until":null},"file":"seats.jsonl","seq":7}','e0e2d254d57f746a44733a5a3bfced6d1167b9d74b522257c96548eff63b7c5d','77a37f3d05886101b9d34f58e64cbb6163d85e52b2813dee11560d707b20c4ed');
INSERT INTO "events" VALUES(8,'2026-01-01T00:00:17.000Z','record_failed',NULL,'{"file":"seats.jsonl","line":8,"problem":"target is empty","remedy":"give it one"}','77a37f3d05886101b9d34f58e64cbb6163d85e52b2813dee11560d707b20c4ed','6c900460bdc81c6764cc6d8875e13945047fdb7d85a5b075594acf872463af0e');
INSERT INTO "events" VALUES(9,'2026-01-01T00:00:21.000Z','fact_live-side','143fb3e51cfc','{"after":"Oslo","before":"Lima","from":"received","generation":null,"reason":null,"tier":"side","to":"live-side"}','6c900460bdc81c6764cc6d8875e13945047fdb7d85a5b075594acf872463af0e','f8f555229f5eb26feeeaae1f7826c1fb584d955fba9c15d8a3c3a91d809122fe');
INSERT INTO "events" VALUES(10,'2026-01-01T00:00:23.000Z','fact_superseded','094a2e9b7916','{"after":null,"before":null,"from":"received","generation":null,"reason":"is superseded","tier":null,"to":"superseded"}','f8f555229f5eb26feeeaae1f7826c1fb584d955fba9c15d8a3c3a91d809122fe','24c27cdf0ecddb2251b1e8d06eea5595a94194f3d9e1e82794bedd53531a312a');
INSERT INTO "events" VALUES(11,'2026-01-01T00:00:25.000Z','fact_reverted','429c349bedf1','{"after":null,"before":null,"from":"received","generation":null,"reason":"is reverted","tier":null,"to":"reverted"}','24c27cdf0ecddb2251b1e8d06eea5595a94194f3d9e1e82794bedd53531a312a','462d58844d752ed9ed18939c957913ab2da08070ec8d6eba335f2ab08ff3672f');
INSERT INTO "events" VALUES(12,'2026-01-01T00:00:27.000Z','fact_expired','a1b83e1154bb','{"after":null,"before":null,"from":"received","generation":null,"reason":"is expired","tier":null,"to":"expired"}','462d58844d752ed9ed18939c957913ab2da08070ec8d6eba335f2ab08ff3672f','d97870c5f21ab62fd1e5fc38b4681cba7ef1fde0d03d9ea8dcbdaa21d33461fc');
INSERT INTO "events" VALUES(13,'2026-01-01T00:00:29.000Z','fact_rejected','fd767b55975b','{"after":null,"before":null,"from":"received","generation":null,"reason":"is rejected","tier":null,"to":"rejected"}','d97870c5f21ab62fd1e5fc38b4681cba7ef1fde0d03d9ea8dcbdaa21d33461fc','a7e5abf1b2852c9999d45f6d0c34a66f5f0950fb1c08e8f73559569cab00b02f');
INSERT INTO "events" VALUES(14,'2026-01-01T00:00:31.000Z','fact_failed','12dea8d48bb3','{"after":null,"before":null,"from":"received","generation":null,"reason":"is failed","tier":null,"to":"failed"}','a7e5abf1b2852c9999d45f6d0c34a66f5f0950fb1c08e8f73559569cab00b02f','ef05b2f711468a1a1a78cc898fbc87d973f961361560280433e5c519c789b1bc');
INSERT INTO "events" VALUES(15,'2026-01-01T00:00:33.000Z','generation_switched',NULL,'{"from":0,"reason":"flush","to":1,"weights":"efefefefefefefefefefefefefefefefefefefefefefefefefefefefefefefef"}','ef05b2f711468a1a1a78cc898fbc87d973f961361560280433e5c519c789b1bc','780c85833eba6ad8757ee08db25776efedffd70a0d31b5697c43db4b09634315');
INSERT INTO "events" VALUES(16,'2026-01-01T00:00:34.000Z','generation_switched',NULL,'{"from":1,"reason":"base","to":0,"weights":""}','780c85833eba6ad8757ee08db25776efedffd70a0d31b5697c43db4b09634315','eaf0aeb0bbd97f6a6b382f2200a9ba8cf30a8959c73196f97c6934589971a23f');
INSERT INTO "events" VALUES(17,'2026-01-01T00:00:36.000Z','audit',NULL,'{"audit":1,"figures":{"norm_ratio":{"4":"inf"}},"generation":0,"reasons":[],"seconds":0.5,"verdict":"keep"}','eaf0aeb0bbd97f6a6b382f2200a9ba8cf30a8959c73196f97c6934589971a23f','fbfae9aea31ef1b63d305a7a4d45cda2dc7aa7c252d12e4c089b19b405ee092e');
INSERT INTO "events" VALUES(18,'2026-01-01T00:00:39.000Z','daemon_stopped',NULL,'{}','fbfae9aea31ef1b63d305a7a4d45cda2dc7aa7c252d12e4c089b19b405ee092e','e7aaf4f273fa40ff6a73af24d1b9e870088d4e3248c002d8bcca069e410d006a');
CREATE TABLE facts(
        id TEXT PRIMARY KEY, seq INT NOT NULL, slot TEXT NOT NULL, subject TEXT NOT NULL,
        prompt TEXT NOT NULL, target TEXT NOT NULL, record TEXT NOT NULL, state TEXT NOT NULL,
        tier TEXT CHECK (tier IN ('side', 'weights')), generation INT, direct INT NOT NULL,
        reason TEXT, file_name TEXT NOT NULL, received_at TEXT NOT NULL,
        changed_at TEXT NOT NULL, attempts INT NOT NULL DEFAULT 0, external_id TEXT,
        valid_until TEXT, before TEXT, after TEXT, probe TEXT) STRICT;
INSERT INTO "facts" VALUES('094567839cf7',1,'country 1
The seat of country 1 is','country 1','The seat of {} is','Rome','{"external_id":"mine","neighbours":[{"answer":null,"prompt":"The seat of country 21 is"}],"paraphrases":["{} has its seat in"],"prompt":"The seat of {} is","source":"Atlas \u2014 page 7","subject":"country 1","tags":["seats"],"target":"Rome","valid_from":"2026-01-01T00:00:00Z","valid_until":null}','received',NULL,NULL,0,NULL,'seats.jsonl','2026-01-01T00:00:02.000Z','2026-01-01T00:00:02.000Z',0,'mine',NULL,NULL,NULL,NULL);
INSERT INTO "facts" VALUES('143fb3e51cfc',2,'country 2
The seat of country 2 is','country 2','The seat of {} is','Oslo','{"external_id":null,"neighbours":[{"answer":"Lima","prompt":"The seat of country 22 is"}],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 2","tags":[],"target":"Oslo","valid_from":null,"valid_until":null}','live-side','side',NULL,0,NULL,'seats.jsonl','2026-01-01T00:00:04.000Z','2026-01-01T00:00:20.000Z',0,NULL,NULL,'Lima','Oslo','{"answers":true}');
INSERT INTO "facts" VALUES('094a2e9b7916',3,'country 3
The seat of country 3 is','country 3','The seat of {} is','Lima','{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 3","tags":[],"target":"Lima","valid_from":null,"valid_until":null}','superseded',NULL,NULL,0,'is superseded','seats.jsonl','2026-01-01T00:00:06.000Z','2026-01-01T00:00:22.000Z',0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "facts" VALUES('429c349bedf1',4,'country 4
The seat of country 4 is','country 4','The seat of {} is','Cairo','{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 4","tags":[],"target":"Cairo","valid_from":null,"valid_until":null}','reverted',NULL,NULL,0,'is reverted','seats.jsonl','2026-01-01T00:00:08.000Z','2026-01-01T00:00:24.000Z',0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "facts" VALUES('a1b83e1154bb',5,'country 5
The seat of country 5 is','country 5','The seat of {} is','Quito','{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 5","tags":[],"target":"Quito","valid_from":null,"valid_until":"2026-01-01T00:00:30Z"}','expired',NULL,NULL,0,'is expired','seats.jsonl','2026-01-01T00:00:10.000Z','2026-01-01T00:00:26.000Z',0,NULL,'2026-01-01T00:00:30Z',NULL,NULL,NULL);
INSERT INTO "facts" VALUES('fd767b55975b',6,'country 6
The seat of country 6 is','country 6','The seat of {} is','Paris','{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 6","tags":[],"target":"Paris","valid_from":null,"valid_until":null}','rejected',NULL,NULL,0,'is rejected','seats.jsonl','2026-01-01T00:00:12.000Z','2026-01-01T00:00:28.000Z',0,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "facts" VALUES('12dea8d48bb3',7,'country 7
The seat of country 7 is','country 7','The seat of {} is','Delhi','{"external_id":null,"neighbours":[],"paraphrases":[],"prompt":"The seat of {} is","source":null,"subject":"country 7","tags":[],"target":"Delhi","valid_from":null,"valid_until":null}','failed',NULL,NULL,0,'is failed','seats.jsonl','2026-01-01T00:00:14.000Z','2026-01-01T00:00:30.000Z',0,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE generations(
        id INTEGER PRIMARY KEY, sha256 TEXT, weights_hash TEXT NOT NULL,
        parent INT REFERENCES generations(id), reason TEXT NOT NULL, fact_ids TEXT NOT NULL,
        figures TEXT NOT NULL, created_at TEXT NOT NULL) STRICT;
INSERT INTO "generations" VALUES(0,NULL,'',NULL,'base','[]','{}','2026-01-01T00:00:01.000Z');
INSERT INTO "generations" VALUES(1,'cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd','efefefefefefefefefefefefefefefefefefefefefefefefefefefefefefefef',0,'flush','["429c349bedf1"]','{"norm_ratio":{"4":1.01}}','2026-01-01T00:00:32.000Z');
CREATE TABLE job_run(
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, scheduled_for TEXT NOT NULL,
        started_at TEXT NOT NULL, finished_at TEXT, outcome TEXT, detail TEXT) STRICT;
INSERT INTO "job_run" VALUES(1,'audit','2026-01-01T00:00:00Z','2026-01-01T00:00:37.000Z','2026-01-01T00:00:38.000Z','ok','keep');
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
INSERT INTO "meta" VALUES('active_generation','0');
CREATE TABLE shards(
        id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, facts INT NOT NULL,
        threshold REAL NOT NULL, created_at TEXT NOT NULL) STRICT;
INSERT INTO "shards" VALUES(1,'abababababababababababababababababababababababababababababababab',1,0.5,'2026-01-01T00:00:18.000Z');
CREATE TABLE side_keys(
        fact_id TEXT PRIMARY KEY REFERENCES facts(id), shard INT NOT NULL,
        sha256 TEXT NOT NULL, tensors BLOB NOT NULL) STRICT;
INSERT INTO "side_keys" VALUES('143fb3e51cfc',1,'9c378e3e74f2609f791cb36a2e7ab490a790bbb84a18d2a25195edf5eaadae44',X'6B657973206F662074686520666972737420666F726D');
CREATE TABLE submissions(
        work_name TEXT PRIMARY KEY, file_name TEXT NOT NULL, sha256 TEXT NOT NULL,
        received_at TEXT NOT NULL, accepted INT NOT NULL, failed INT NOT NULL,
        duplicates INT NOT NULL) STRICT;
INSERT INTO "submissions" VALUES('20260101T000001000000Z-00000000-seats.jsonl','seats.jsonl','5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e','2026-01-01T00:00:16.000Z',7,1,0);
CREATE TABLE terms(
        fact_id TEXT PRIMARY KEY REFERENCES facts(id), sha256 TEXT NOT NULL,
        tensors BLOB NOT NULL) STRICT;
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
CREATE UNIQUE INDEX facts_seq ON facts(seq);
CREATE INDEX facts_state ON facts(state);
CREATE INDEX facts_slot ON facts(slot);
CREATE INDEX facts_external_id ON facts(external_id);
CREATE INDEX edits_fact_id ON edits(fact_id);
CREATE INDEX job_run_name ON job_run(name);
CREATE INDEX events_fact_id ON events(fact_id);
CREATE TRIGGER events_no_update BEFORE UPDATE ON events
        BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_no_delete BEFORE DELETE ON events
        BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_no_replace BEFORE INSERT ON events
        WHEN EXISTS (SELECT 1 FROM events WHERE seq = NEW.seq)
        BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
COMMIT;
