-- A ledger of format 1, as fedinfer 0.1.0 wrote it (commit 1ec3586): the dump of its database.
PRAGMA application_id = 1178944585;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE entries (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    attempt INTEGER NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL
);
INSERT INTO "entries" VALUES(1,'enrol','',0,0,'{"created": "2026-11-24T22:12:07+00:00", "delta": 2e-05, "enrolment": "110780f06d1a72673419b870bb36edab", "epsilon": 4.0}','352ea0ceb97e110b1434d36d839d1104c1208fab1c82e0bba036903098eac05c');
INSERT INTO "entries" VALUES(2,'charge','a',0,0,'{"delta": 1e-06, "digest": "463987586088a65c92755f25717c2271cadedf90ba920333571cf228f1d7acd6", "epsilon": 1.2110366569221462, "plan": {"clip_norm": 1.0, "delta": 1e-06, "divisor": 10.0, "noise_multiplier": 4.0, "sampling_rate": 0.5, "steps": 4, "unit": "example"}, "steps": 4}','84c7dbfb4f50c15a6ae8e14b8170a1cc5e8c05fc56e5b7b848c727e4a3ba2b6c');
INSERT INTO "entries" VALUES(3,'reserve','a',1,1,'{"void": false}','edd7b965fbe9985b2a1a6c50f74455407723f5b8bb6e31c0938499acbdac40a6');
INSERT INTO "entries" VALUES(4,'commit','a',1,1,'{}','5675afc5e7d3a351efb3dbf26873c9116c1ec397cd7c4218e46e89587edc4cd9');
INSERT INTO "entries" VALUES(5,'reserve','a',2,1,'{"void": false}','3eb45fad509b37705ab0f9a4aafb6711347f6210ea70803e14fd35166a1b863a');
INSERT INTO "entries" VALUES(6,'reserve','a',2,2,'{"void": false}','db271223b1ceda4c0e7b86076495e8698345d7dc927a84d8ba51cdf9ee39c054');
INSERT INTO "entries" VALUES(7,'commit','a',2,2,'{}','f4f7ba4faf44b03636e6417514f6918de539151d3ebd2b6ba6142423a96fed56');
INSERT INTO "entries" VALUES(8,'charge','b',0,0,'{"delta": 1e-06, "digest": "5648ed9de52eea00e130f1c1942e06e79671cd1757f96a0b2bb62c9b0976cc0b", "epsilon": 1.2538850719121628, "plan": {"clip_norm": 2.0, "delta": 1e-06, "divisor": 10.0, "noise_multiplier": 3.0, "sampling_rate": 0.5, "steps": 2, "unit": "example"}, "steps": 2}','3ce94d75d78a44a372fc0a9387ffb90308fe1760234d142a2e9cbff0e46906d3');
INSERT INTO "entries" VALUES(9,'reserve','b',1,1,'{"void": true}','cf4ff7feee4a1c972aeaf6672eedc566ba9d364e28fbb64301c2014f56a4fda0');
INSERT INTO "entries" VALUES(10,'commit','b',1,1,'{}','64f660ef2bfe522335bc85e76ee27c0a223c87646c0b6c5593f8046605736d15');
CREATE UNIQUE INDEX once ON entries (kind, run, round, attempt);
COMMIT;
