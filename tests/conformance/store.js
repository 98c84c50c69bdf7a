// STOW-RS by the npm package dicomweb-client, which OHIF uploads by.  Arguments: the folder of node_modules, the base URL,
// a study UID, files.  On standard output a JSON array of {body} or {status}, what became of storing the files: as they
// are, as of that study, and as of another.
'use strict';

const { readFileSync } = require('fs');

const [modules, url, studyInstanceUID, ...files] = process.argv.slice(2);
globalThis.XMLHttpRequest = require(`${modules}/xhr2`).XMLHttpRequest;
const { api } = require(`${modules}/dicomweb-client`);

console.error = console.log = () => {}; // it tells of failures there too
const client = new api.DICOMwebClient({ url });
const datasets = files.map((file) => new Uint8Array(readFileSync(file)).buffer);

function store(options) {
  return client.storeInstances({ datasets, ...options }).then(
    (body) => ({ body: JSON.parse(body) }),
    (error) => ({ status: error.status }),
  );
}

async function all() {
  return [await store({}), await store({ studyInstanceUID }), await store({ studyInstanceUID: '1.2.3' })];
}

all().then((answers) => process.stdout.write(JSON.stringify(answers)));
