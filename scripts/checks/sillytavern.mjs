// SillyTavern's own routes for pictures, without the rest of its server.
// Run in an unpacked package of it whose imports are installed: node sillytavern.mjs [PORT]; prints the port.
import express from 'express';
import { setConfigFilePath } from './src/util.js';

setConfigFilePath('default/config.yaml');
const { router } = await import('./src/endpoints/stable-diffusion.js');
const app = express();
app.use(express.json({ limit: '64mb' }));
app.use('/api/sd', router);
const server = app.listen(Number(process.argv[2] ?? 0), '127.0.0.1', () => console.log(server.address().port));
